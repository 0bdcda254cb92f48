"""The policy (trunk and head in one forward) and the models it is built from."""
