"""The stages of a run: what each takes of the policy and of the stages before it, and what it leaves in the run's
folder.
"""
