"""Students that are their own teachers: generations, branches, momentum, experts of one body."""
