"""Reports for people: contact sheets, figures and self-contained HTML pages."""
