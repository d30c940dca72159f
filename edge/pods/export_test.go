package pods

// Defaults fills in what the API server would have.
var Defaults = defaults
