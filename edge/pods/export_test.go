package pods

import "context"

// Defaults fills in what the API server would have.
var Defaults = defaults

// Terminate is the node's shutdown, as logind would tell of it.
func (e *Engine) Terminate(ctx context.Context) { e.shutdown.Terminate(ctx) }
