"""A grid's report: effects against baselines, declared contrasts, the response surface, advice on a teacher, figures and the page.

Every number is computed once, as rows of a table; figures, page and summary draw these rows.
"""
