"""Where rows come from: one small class for each kind of source, which yields its rows as they are stored."""
