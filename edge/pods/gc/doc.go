// Package gc removes what ended pods and containers leave in the runtime and in
// the log folder, as the kubelet's container garbage collection: of each
// container of a living pod one dead instance is kept (kubectl logs --previous),
// of each living pod the newest sandbox; of pods that are gone nothing stays.
//
//	c := gc.Collector{Runtime: cri, LogRoot: "/var/log/pods", LinkDir: "/var/log/containers", Gone: gone, Logger: log}
//	err := c.Collect(ctx)
//
// [Decide] is the decision alone.
package gc
