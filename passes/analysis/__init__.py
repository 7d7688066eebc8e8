"""What passes need to know of a graph before they rewrite it; nothing here changes one."""
