"""The delivery files held against schemas, against each other and against the settings; no container engine needed."""
