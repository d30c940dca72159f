package pods

import (
	"context"

	"k8s.io/apimachinery/pkg/types"
)

// Defaults fills in what the API server would have.
var Defaults = defaults

// Terminate is the node's shutdown, as logind would tell of it.
func (e *Engine) Terminate(ctx context.Context) { e.shutdown.Terminate(ctx) }

// Gone tells whether nobody wants a pod.
func (e *Engine) Gone(uid types.UID) bool { return e.gone(uid) }
