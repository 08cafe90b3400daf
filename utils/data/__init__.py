"""Data: from files on a disk to images, labels and masks; public data sets and the rendered sample.

Whoever lives here knows pixels and folders. No model, no score and no picture of a result comes in.
"""
