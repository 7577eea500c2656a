"""The default method: which parts it takes, how far it trusts each, and how many labels or answers it considers wrong.

auto.py is the method. trust.py has what follows from how well scores tell right from wrong: weights and log-odds.
witnesses.py asks the queries of a store, and share_wrong.py estimates the share of wrong examples from what they say.
"""
