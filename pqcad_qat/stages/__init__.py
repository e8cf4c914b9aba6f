"""The stages of a run: what each one reads from the policy and from earlier stages, and what it leaves in the run's
folder.
"""
