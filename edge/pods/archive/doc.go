// Package archive moves images between files and containerd, for sites without a
// registry. It uses containerd's own client, for the CRI has no verb for that.
//
//	c, err := archive.Dial("unix:///run/containerd/containerd.sock")
//	images, err := c.ImportFile(ctx, "app.tar.zst", archive.Options{}, nil)
//	err = c.Export(ctx, w, "fairlead.test/app:1")
//
// Archives are what docker save, podman save, buildah, skopeo and ctr write: OCI
// layouts and docker archives in a tar file, plain or compressed with gzip or
// zstd. An import is whole or leaves nothing behind.
//
// The running agent does not use this package, whose client is larger than the
// rest of the pod engine: it has the command `fairlead-edge images` do it, see
// package folder.
package archive
