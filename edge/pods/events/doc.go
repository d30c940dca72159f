// Package events records Kubernetes events about the node's pods as client-go's
// recorder does, without client-go and without an API server: what repeats itself
// becomes one event with a count, what varies only in its message is combined
// after ten within ten minutes, and an object that never stops is slowed down to
// one event in five minutes. What is left goes to Config.Publish.
//
//	r, err := events.New(events.Config{Component: "fairlead-edge", Publish: publish, Logger: log, Metrics: reg})
//	go r.Run(ctx)
//	r.Event(events.Ref{Kind: "Pod", Namespace: "default", Name: "pump", UID: uid, FieldPath: "spec.containers{app}"},
//		corev1.EventTypeNormal, "Pulled", "…")
//
// The memory of what was seen is lost with the process, as the kubelet's.
package events
