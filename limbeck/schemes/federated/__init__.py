"""What federated schemes share: data split among owners, the wire, and rounds with those who answer."""
