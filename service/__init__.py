"""Online: a bundle behind HTTP. Never imports `training`; torch only in `service.engine`."""
