// Package controlplane keeps a Kubernetes control plane running in one folder:
// it makes the certificates, starts etcd, kube-apiserver,
// kube-controller-manager and kube-scheduler as children, says when they are
// ready and stops them all when one of them dies or its context ends.
//
//	err := controlplane.Run(ctx, controlplane.Options{
//		Dir:    dir,
//		Bind:   net.IPv4(127, 0, 0, 1),
//		Logger: slog.Default(),
//		Ready:  func(e controlplane.Endpoint) { fmt.Println(e.Kubeconfig) },
//	})
//
// It imports nothing of Kubernetes, so its tests compile in a second; each child
// is the running executable again with a [Component] as its first argument.
//
// The folder, all of it readable by its owner only:
//
//	kubeconfig   administrator, client certificate inside
//	log          lines of all components, each with the component's name
//	log.old      the log before, once it grew beyond 16 MiB
//	lock         held while a devcluster runs here
//	state.json   the port of the last run
//	pki/         authorities, certificates and keys
//	run/         etcd's socket and the components' kubeconfigs; their working directory
//	etcd/        the data
package controlplane
