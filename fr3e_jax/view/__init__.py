"""A page that shows runs: their numbers over steps, and the tree of every question that was kept.

A run directory is read (`runs`, `rollouts`) and packed into parts, which a browser unpacks when it needs them
(`packing`, `parts`). The page is one HTML file (`document`), or is served on this machine (`server`). What
the browser runs is in `page/`, as it is written: there is no build step.
"""
