"""What turns a prompt into items: the protocol (`base`) and the engines that keep it."""
