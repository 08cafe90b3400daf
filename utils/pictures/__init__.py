"""Pictures: every figure, table and page that a person looks at.

Whoever lives here draws what it is given. Nothing is measured, loaded or scored here.
"""
