"""Everything Mica does inside a guest, through the official QEMU guest agent and nothing else.

``channel`` carries requests over the agent's socket, ``agent`` gives each command its types, ``exec`` runs commands
that outlive the daemon, ``copy`` moves files as tar streams. Whatever a guest says is hostile input: every reply is
bounded in size and time and decoded into a type before anybody looks at it.
"""
