"""report.html and what else a person looks at: drawn from report.json's numbers alone.

document     report.html: one file, read without scripts, no request leaves it
pictures     reliability diagram, curves, boxes: vector graphics for the page, PNG for the model card
figures      numbers as people read them
differences  two texts with the spans in which they differ
inert        texts of others, made visible and harmless
leaderboard  many models in one table: markdown, html, csv
contestants  the models of that table, read and judged
"""
