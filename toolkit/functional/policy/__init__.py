"""One small file for each family of policy losses; every module here is loaded by the registry.

The modules import no torch at the top: tensor methods and the methods of ``t`` (`PolicyTerms`) are all they need, and
the command line can then check a loss's options in a moment.
"""
