// Package probe asks containers whether they have started, are ready and are
// alive: startup, readiness and liveness probes by exec, HTTP, TCP and gRPC.
//
//	p, err := probe.New(probe.Config{Exec: execSync, Changed: wakePod, Event: record})
//	p.Set(pod, "10.88.0.7", []probe.Running{{Name: "web", ID: id, Since: startedAt}})
//	ready, known := p.Ready(id)
//
// A probe that waits costs one timer: no goroutine and no connection.
//
// The times are those of the stock kubelet: a startup or liveness probe runs first
// one period after the container started (later with initialDelaySeconds), a
// readiness probe as soon as the container has started and its initial delay is
// over. The two exceptions are better for the node: the random wait is only for
// containers that ran before the agent did, and a probe that is in flight ends when
// its container does.
package probe
