"""What Mica does: verbs as journaled sagas, one actor for each VM, admission, and the loops that keep state true."""
