"""The report's pictures: inline SVG, drawn here.

Not plotly: its script alone weighs 4.5 MB in every report, draws text too small for a phone and knows one colour scheme
at a time. These few charts need no script, print well, follow the reader's light or dark scheme through the page's
colours, and a whole report stays below a few hundred kilobytes.
"""
