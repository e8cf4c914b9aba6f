"""Model families: one file per family with all facts about it. The files need only numpy, since the deployed code reads
them too.

Not here: loading and calling models (models/).
"""
