"""Pipeline: from settings and images to memory banks, and from memory banks to scores and figures of merit.

Whoever lives here serves several scripts. What only one script does stays in that script.
"""
