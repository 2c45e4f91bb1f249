"""The processes that grade what could hang, crash or take all memory."""
