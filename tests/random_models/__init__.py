"""Random small models whose samples interact, each asked of one engine several times and compared with autograd."""
