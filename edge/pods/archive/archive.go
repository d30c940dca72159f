package archive

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

const (
	// namespace is where containerd's CRI keeps its images.
	namespace = "k8s.io"

	// labelArchive says which file of a watched folder an image came from; see
	// Options.Archive.
	labelArchive = "fairlead.dev/archive"
	// labelPinned keeps an image from being collected, with containerd from 1.7 on.
	labelPinned, pinned = "io.cri-containerd.pinned", "pinned"
	// labelManaged is set by the CRI once it knows an image.
	labelManaged = "io.cri-containerd.image"

	// leaseTime is how long containerd keeps what an import that was killed has
	// written. Longer imports lose nothing: 6 h at 1 MB/s are 20 GB.
	leaseTime = 6 * time.Hour
	// cleanupTime bounds what is done after a failure.
	cleanupTime = time.Minute
	// criTime is how long the CRI may take to notice a new image.
	criTime = 10 * time.Second
)

// Image is an image of the runtime.
type Image struct {
	Name    string `json:"name"`
	Digest  string `json:"digest"`            // the manifest's or index's
	Size    int64  `json:"size"`              // bytes of the (compressed) layers and the rest
	Archive string `json:"archive,omitempty"` // the file of the watched folder that it came from
	Pinned  bool   `json:"pinned,omitempty"`  // it is not collected, whatever the disk
}

// Client talks to containerd. Its methods may be called from several goroutines.
type Client struct {
	c        *containerd.Client
	endpoint string
	platform platforms.MatchComparer
}

// Dial makes a client of the containerd that listens at endpoint, a unix socket.
// It does not wait for containerd.
func Dial(endpoint string) (*Client, error) {
	path := strings.TrimPrefix(endpoint, "unix://")
	if !strings.HasPrefix(path, "/") {
		return nil, fmt.Errorf("container runtime %q: want a unix socket, such as unix:///run/containerd/containerd.sock", endpoint)
	}
	p := platforms.Default()
	c, err := containerd.New(path, containerd.WithDefaultNamespace(namespace), containerd.WithDefaultPlatform(p))
	if err != nil {
		return nil, fmt.Errorf("container runtime %s: %w", endpoint, err)
	}
	return &Client{c: c, endpoint: endpoint, platform: p}, nil
}

// Close ends the connection.
func (c *Client) Close() error { return c.c.Close() }

// ErrNoSpace is wrapped by the errors of an import or export that a full disk
// has stopped: make room and try again.
var ErrNoSpace = errors.New("no space left on the disk")

// ErrAway is wrapped by errors about a containerd that does not answer.
var ErrAway = errors.New("containerd does not answer")

// explain says what an error of containerd means where its own text does not.
func (c *Client) explain(err error) error {
	switch {
	case err == nil:
		return nil
	case strings.Contains(err.Error(), "no space left on device"):
		return fmt.Errorf("%w of containerd: remove images (crictl rmi --prune) or files: %w", ErrNoSpace, err)
	case status.Code(err) == codes.Unavailable || errdefs.IsUnavailable(err):
		return fmt.Errorf("%w at %s: is it running, and is the socket right (--socket)? %w", ErrAway, c.endpoint, err)
	}
	return err
}

// List gives the images by name, but for the names that are digests, which the
// CRI gives each image besides.
func (c *Client) List(ctx context.Context) ([]Image, error) {
	ctx = namespaces.WithNamespace(ctx, namespace)
	all, err := c.c.ListImages(ctx)
	if err != nil {
		return nil, fmt.Errorf("list the images: %w", c.explain(err))
	}
	out := make([]Image, 0, len(all))
	for _, i := range all {
		if strings.HasPrefix(i.Name(), "sha256:") {
			continue
		}
		image, err := c.describe(ctx, i)
		if errdefs.IsNotFound(err) {
			continue // it was removed meanwhile, or holds nothing for this platform
		}
		if err != nil {
			return nil, fmt.Errorf("image %s: %w", i.Name(), c.explain(err))
		}
		out = append(out, image)
	}
	slices.SortFunc(out, func(a, b Image) int { return cmp.Compare(a.Name, b.Name) })
	return out, nil
}

func (c *Client) describe(ctx context.Context, i containerd.Image) (Image, error) {
	size, err := i.Size(ctx)
	if err != nil {
		return Image{}, err
	}
	labels := i.Labels()
	return Image{
		Name: i.Name(), Digest: i.Target().Digest.String(), Size: size,
		Archive: fileOf(labels[labelArchive]), Pinned: labels[labelPinned] == pinned,
	}, nil
}

// leased keeps what is written from containerd's collector until done is called,
// which waits until whatever no image refers to is gone.
func (c *Client) leased(ctx context.Context) (_ context.Context, done func() error, err error) {
	ls := c.c.LeasesService()
	l, err := ls.Create(ctx, leases.WithRandomID(), leases.WithExpiration(leaseTime))
	if err != nil {
		return nil, nil, c.explain(err)
	}
	return leases.WithLease(ctx, l.ID), func() error {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupTime)
		defer cancel()
		if err := ls.Delete(ctx, l, leases.SynchronousDelete); err != nil && !errdefs.IsNotFound(err) {
			return fmt.Errorf("clean up: %w", c.explain(err))
		}
		return nil
	}, nil
}

// put stores images, all or none.
func (c *Client) put(ctx context.Context, imgs []images.Image) (err error) {
	is := c.c.ImageService()
	var undo []func(context.Context) error
	defer func() {
		if err == nil {
			return
		}
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupTime)
		defer cancel()
		for _, f := range slices.Backward(undo) {
			err = errors.Join(err, f(ctx))
		}
	}()
	for _, i := range imgs {
		old, err := is.Get(ctx, i.Name)
		switch {
		case errdefs.IsNotFound(err):
			if _, err := is.Create(ctx, i); err != nil {
				return err
			}
			undo = append(undo, func(ctx context.Context) error { return is.Delete(ctx, i.Name) })
		case err != nil:
			return err
		case old.Target.Digest != i.Target.Digest:
			// Without its old labels the CRI takes notice of it anew.
			if _, err := is.Update(ctx, i, "target", "labels"); err != nil {
				return err
			}
			undo = append(undo, func(ctx context.Context) error {
				_, err := is.Update(ctx, old, "target", "labels")
				return err
			})
		}
	}
	return nil
}

// label sets labels of images that are stored; an empty value removes one.
func (c *Client) label(ctx context.Context, name string, labels map[string]string) error {
	fields := make([]string, 0, len(labels))
	for l := range labels {
		fields = append(fields, "labels."+l)
	}
	_, err := c.c.ImageService().Update(ctx, images.Image{Name: name, Labels: labels}, fields...)
	return err
}

// awaitCRI waits until the CRI knows an image: a pod that is started next finds it.
func (c *Client) awaitCRI(ctx context.Context, name string) error {
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for end := time.Now().Add(criTime); time.Now().Before(end); {
		i, err := c.c.ImageService().Get(ctx, name)
		if err != nil || i.Labels[labelManaged] != "" {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		}
	}
	return nil // a containerd without CRI
}
