"""Pictures: every figure, table and page that a person looks at.

Whoever lives here draws what it is given or what the scripts have written. Nothing is measured or scored here.
"""
