"""A model of any recipe as one Python file for Transformers, made from the modules of this package."""
