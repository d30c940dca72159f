// Package image brings container images to the node and takes them away again,
// as the kubelet's image manager does: pull policies, pull secrets, back-off,
// serial or parallel pulls, events; and garbage collection between two thresholds
// that spares what runs, what is pinned and what desired pods need.
//
//	images, err := image.New(image.Config{Runtime: cri, Event: event, Desired: desired, Logger: log, Metrics: reg})
//	go images.Run(ctx) // garbage collection
//	ref, err := images.Ensure(ctx, pod, &container, secrets, sandbox)
//	var e *image.Error
//	if errors.As(err, &e) { … e.Reason is ErrImagePull, ImagePullBackOff, …; try again at e.Until … }
//
// # Who may use a private image
//
// A pod that asks for a present image with IfNotPresent or Never must be able to
// pull it, where the agent pulled it with somebody's secret: with the same secret
// or the same credentials it may use it, else it has to pull it with its own. This
// is the kubelet's policy NeverVerifyPreloadedImages, its default. The kubelet
// keeps its records on disk; here they are in memory, so an image that was pulled
// before the agent started counts as preloaded, and any pod of the node may use
// it. That errs on the side of pods that have to start without the network. Where
// tenants must not see each other's images, use the policy Always.
package image
