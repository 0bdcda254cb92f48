"""One small file for each family of policy losses; the registry loads every module here.

The modules do not import torch at the top, so the command line can check a loss's options quickly. They only need
tensor methods and the methods of ``t`` (`PolicyTerms`).
"""
