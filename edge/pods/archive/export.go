package archive

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	imagearchive "github.com/containerd/containerd/v2/core/images/archive"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
)

// Export writes images as one archive: an OCI layout in a tar file that docker
// load takes too. Of images for several platforms it has this one's.
func (c *Client) Export(ctx context.Context, w io.Writer, names ...string) error {
	ctx = namespaces.WithNamespace(ctx, namespace)
	opts := []imagearchive.ExportOpt{imagearchive.WithPlatform(c.platform)}
	for _, name := range names {
		ref, err := reference.ParseDockerRef(name)
		if err != nil {
			return fmt.Errorf("image %q: %w", name, err)
		}
		i, err := c.c.ImageService().Get(ctx, ref.String())
		if errdefs.IsNotFound(err) {
			return fmt.Errorf("image %s is not present; see: fairlead-edge images list", name)
		}
		if err != nil {
			return fmt.Errorf("image %s: %w", name, c.explain(err))
		}
		opts = append(opts, imagearchive.WithManifest(i.Target, i.Name))
	}
	if err := c.c.Export(ctx, w, opts...); err != nil {
		if errdefs.IsNotFound(err) {
			return fmt.Errorf("export: the runtime no longer has all of an image, as where it discards layers once they are unpacked: %w", err)
		}
		return fmt.Errorf("export: %w", c.explain(err))
	}
	return nil
}

// ExportFile exports to a file, which is there once it is whole.
func (c *Client) ExportFile(ctx context.Context, file string, names ...string) (err error) {
	f, err := os.CreateTemp(filepath.Dir(file), "."+filepath.Base(file)+".*")
	if err != nil {
		return err
	}
	defer func() {
		if err == nil {
			return
		}
		_ = f.Close() // it may be closed
		if rmErr := os.Remove(f.Name()); rmErr != nil && !errors.Is(rmErr, fs.ErrNotExist) {
			err = errors.Join(err, rmErr)
		}
		if errors.Is(err, syscall.ENOSPC) {
			err = fmt.Errorf("%w of %s: %w", ErrNoSpace, file, err)
		}
	}()
	if err := c.Export(ctx, f, names...); err != nil {
		return err
	}
	if err := f.Chmod(0o644); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	return os.Rename(f.Name(), file)
}
