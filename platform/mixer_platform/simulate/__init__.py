"""The demo's data: a marketplace of open emoji drawings, photos of them, and the clicks that people would make."""
