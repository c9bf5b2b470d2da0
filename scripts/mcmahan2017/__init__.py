"""What scripts/reproduce_mcmahan2017.py is made of: plan, search, work, report."""
