"""The web page: panels that lay out components, and one file of callbacks that calls the application."""

import os

# Gradio decides at import whether it reports usage to its makers. This page talks to nobody but its own browser.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
