"""The promise of the house, checked: one suite of checks for every objective, limbeck's own and anybody else's.

``limbeck.testing`` hands on what users need. The files here hold one group of checks each.
"""
