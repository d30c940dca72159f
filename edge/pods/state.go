package pods

import (
	"context"
	"slices"

	corev1 "k8s.io/api/core/v1"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/fairlead-io/fairlead/edge/node"
)

// State is what the engine knows of the node.
type State struct {
	// Runtime names the container runtime, such as containerd://1.6.20; empty before
	// it has answered once.
	Runtime string
	// Problems keep pods from running, in the kubelet's words.
	Problems []error
	// Images are those on the node.
	Images []*runtimeapi.Image
	// Pressure are MemoryPressure, DiskPressure and PIDPressure.
	Pressure []corev1.NodeCondition
}

// State gives what was found out last.
func (e *Engine) State() State {
	if s := e.state.Load(); s != nil {
		out := *s
		if e.halting.Load() {
			out.Problems = append(slices.Clone(out.Problems), node.ErrShutdown)
		}
		if m := e.pressure.Load(); m != nil { // nil before the runtime has answered once
			out.Pressure = m.Conditions()
		}
		return out
	}
	return State{Problems: []error{node.ErrRuntimeDown}}
}

// Refresh takes the facts about the host anew, now.
func (e *Engine) Refresh() { e.askRelist() }

// observe finds out how the runtime is.
func (e *Engine) observe(ctx context.Context) {
	if ctx.Err() != nil {
		return
	}
	limited, cancel := context.WithTimeout(ctx, lookTimeout)
	defer cancel()
	st, err := e.cri.Status(limited, false)
	if ctx.Err() != nil {
		return
	}
	s := State{Problems: node.RuntimeProblems(st.GetStatus(), err)}
	if r := e.node.Load().Runtime; r.Name != "" {
		s.Runtime = r.Name + "://" + r.Version
	}
	if s.Images, err = e.cri.ListImages(limited, nil); err != nil {
		s.Images = e.State().Images
	}
	e.state.Store(&s)
	if e.cfg.Changed != nil {
		e.cfg.Changed()
	}
}

// NodeEvent records a Kubernetes event about the node.
func (e *Engine) NodeEvent(typ, reason, message string) { e.nodeEvent(typ, reason, message) }

// ImagesArrived lets pods that wait for an image look again.
func (e *Engine) ImagesArrived() {
	for _, p := range e.all() {
		p.wake()
	}
	e.askRelist()
}
