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
// The running agent does not link this package: containerd's client would add 4.2
// MB to its binary and 4.5 MB to its memory. It has the command fairlead-images
// do it, see package folder.
package archive
