package archive

import (
	"archive/tar"
	"bufio"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"syscall"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	imagearchive "github.com/containerd/containerd/v2/core/images/archive"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/distribution/reference"
	"github.com/klauspost/compress/zstd"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Options says what an import makes of an archive. All of it may be left out.
type Options struct {
	// Name is the image's name where the archive has one image.
	Name string
	// Pin keeps the images from being collected.
	Pin bool
	// Archive is remembered with the images; see Folder.
	Archive string
}

// BadArchive is the error of an archive that cannot be imported as it is, now or
// later.
type BadArchive struct{ Err error }

func (e *BadArchive) Error() string { return "bad archive: " + e.Err.Error() }

// Unwrap gives what is bad about it.
func (e *BadArchive) Unwrap() error { return e.Err }

func bad(format string, args ...any) error { return &BadArchive{fmt.Errorf(format, args...)} }

// ImportFile imports an archive. progress, if it is not nil, is told now and then
// how much of the file has been read, in bytes.
func (c *Client) ImportFile(ctx context.Context, file string, o Options, progress func(read, size int64)) ([]Image, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s: %w", file, bad("not a file"))
	}
	images, err := c.Import(ctx, &counted{r: f, size: info.Size(), progress: progress}, o)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	return images, nil
}

// counted tells how much has been read.
type counted struct {
	r          io.Reader
	read, size int64
	progress   func(read, size int64)
}

func (c *counted) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.read += int64(n)
	if c.progress != nil {
		c.progress(c.read, c.size)
	}
	return n, err
}

// Import imports an archive and gives the images in it. On an error nothing of it
// is left in containerd.
func (c *Client) Import(ctx context.Context, r io.Reader, o Options) (_ []Image, err error) {
	ctx = namespaces.WithNamespace(ctx, namespace)
	plain, closePlain, err := decompress(r)
	if err != nil {
		return nil, err
	}
	defer closePlain()
	ctx, done, err := c.leased(ctx)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, done()) }()

	// Whatever the reader fails with is the archive's fault, or the file's.
	src := &source{r: plain}
	index, err := imagearchive.ImportIndex(ctx, c.c.ContentStore(), src)
	if err == nil {
		// The rest, so that a file that was cut off after its last entry is noticed.
		_, err = io.Copy(io.Discard, src)
	}
	if err != nil {
		return nil, c.readError(src, err)
	}
	imgs, err := c.check(ctx, index, o)
	if err != nil {
		return nil, err
	}
	for _, i := range imgs {
		if err := containerd.NewImageWithPlatform(c.c, i, c.platform).Unpack(ctx, ""); err != nil {
			return nil, c.unpackError(i.Name, err)
		}
	}
	if err := c.put(ctx, imgs); err != nil {
		return nil, fmt.Errorf("store the images: %w", c.explain(err))
	}
	return c.finish(ctx, imgs, o)
}

// finish waits for the CRI and sets the labels, which the CRI would have replaced.
func (c *Client) finish(ctx context.Context, imgs []images.Image, o Options) ([]Image, error) {
	labels := map[string]string{}
	if o.Archive != "" {
		labels[labelArchive] = o.Archive
	}
	if o.Pin {
		labels[labelPinned] = pinned
	}
	out := make([]Image, 0, len(imgs))
	for _, i := range imgs {
		if err := c.awaitCRI(ctx, i.Name); err != nil {
			return nil, fmt.Errorf("image %s: %w", i.Name, c.explain(err))
		}
		if len(labels) > 0 {
			if err := c.label(ctx, i.Name, labels); err != nil {
				return nil, fmt.Errorf("label image %s: %w", i.Name, c.explain(err))
			}
		}
		i.Labels = labels
		image, err := c.describe(ctx, containerd.NewImageWithPlatform(c.c, i, c.platform))
		if err != nil {
			return nil, fmt.Errorf("image %s: %w", i.Name, c.explain(err))
		}
		out = append(out, image)
	}
	return out, nil
}

// source remembers what reading an archive failed with.
type source struct {
	r   io.Reader
	err error
}

func (s *source) Read(p []byte) (int, error) {
	n, err := s.r.Read(p)
	if err != nil && err != io.EOF {
		s.err = err
	}
	return n, err
}

// decompress looks at the first bytes and undoes gzip or zstd.
func decompress(r io.Reader) (_ io.Reader, done func(), err error) {
	b := bufio.NewReaderSize(r, 64<<10)
	head, err := b.Peek(4)
	switch {
	case len(head) == 0 && err == io.EOF:
		return nil, nil, bad("the file is empty")
	case err != nil && err != io.EOF:
		return nil, nil, err
	case strings.HasPrefix(string(head), "\x1f\x8b"):
		z, err := gzip.NewReader(b)
		if err != nil {
			return nil, nil, bad("gzip: %w", err)
		}
		return z, func() { _ = z.Close() }, nil
	case string(head) == "\x28\xb5\x2f\xfd":
		z, err := zstd.NewReader(b, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(128<<20))
		if err != nil {
			return nil, nil, bad("zstd: %w", err)
		}
		return z, z.Close, nil
	}
	return b, func() {}, nil
}

// readError says whose fault it is that an archive could not be read.
func (c *Client) readError(src *source, err error) error {
	var errno syscall.Errno
	switch {
	case errors.As(src.err, &errno):
		return fmt.Errorf("read the archive: %w", src.err) // the disk's
	case src.err != nil:
		return bad("it is damaged or was not copied whole: %w", src.err)
	case errors.Is(err, io.ErrUnexpectedEOF):
		return bad("it is not whole: %w; copy it again", err)
	case errors.Is(err, tar.ErrHeader):
		return bad("it is no tar file, nor one in gzip or zstd; make it with docker save, podman save or ctr images export")
	case strings.Contains(err.Error(), "unrecognized image format"):
		return bad("it holds no image (neither oci-layout nor manifest.json); make it with docker save, podman save or ctr images export")
	}
	if e := c.explain(err); e != err { //nolint:errorlint // whether it is another
		return e
	}
	var syntax *json.SyntaxError
	if errdefs.IsNotFound(err) || errors.As(err, &syntax) || !errdefs.IsUnknown(err) && !errdefs.IsCanceled(err) {
		return bad("%w", err)
	}
	return err
}

// unpackError says whose fault it is that layers could not be unpacked.
func (c *Client) unpackError(name string, err error) error {
	if e := c.explain(err); e != err { //nolint:errorlint // whether it is another
		return fmt.Errorf("unpack image %s: %w", name, e)
	}
	for _, s := range []string{"archive/tar", "unexpected EOF", "wrong diff id", "gzip", "zstd", "failed to extract layer"} {
		if strings.Contains(err.Error(), s) {
			return bad("a layer of image %s is damaged: %w", name, err)
		}
	}
	return fmt.Errorf("unpack image %s: %w", name, err)
}

// check sees to it that the images of an archive are whole and have names, and
// binds their content together, so that an image that is stored holds all of it.
func (c *Client) check(ctx context.Context, index ocispec.Descriptor, o Options) ([]images.Image, error) {
	cs := c.c.ContentStore()
	var top ocispec.Index
	b, err := content.ReadBlob(ctx, cs, index)
	if err != nil {
		return nil, c.explain(err)
	}
	if err := json.Unmarshal(b, &top); err != nil {
		return nil, bad("index.json: %w", err)
	}
	if len(top.Manifests) == 0 {
		return nil, bad("index.json names no image")
	}
	var imgs []images.Image
	for _, m := range top.Manifests {
		if err := m.Digest.Validate(); err != nil {
			return nil, bad("index.json: digest %q: %w", m.Digest, err)
		}
		name, err := imageName(m.Annotations)
		if err != nil {
			return nil, err
		}
		if o.Name != "" {
			if len(top.Manifests) > 1 {
				return nil, fmt.Errorf("the archive has %d images: a name can be given to one only", len(top.Manifests))
			}
			ref, err := reference.ParseDockerRef(o.Name)
			if err != nil {
				return nil, fmt.Errorf("name %q: %w", o.Name, err)
			}
			name = ref.String()
		}
		if name == "" {
			return nil, bad("image %.19s has no name: give one with --name, or save it by its name", m.Digest)
		}
		i := images.Image{Name: name, Target: ocispec.Descriptor{MediaType: m.MediaType, Digest: m.Digest, Size: m.Size, Platform: m.Platform}}
		if err := c.whole(ctx, i); err != nil {
			return nil, err
		}
		if !slices.ContainsFunc(imgs, func(x images.Image) bool { return x.Name == name }) {
			imgs = append(imgs, i)
		}
	}
	return imgs, nil
}

// whole sees to it that all of an image for this platform is there.
func (c *Client) whole(ctx context.Context, i images.Image) error {
	cs := c.c.ContentStore()
	handler := images.SetChildrenLabels(cs, images.FilterPlatforms(images.ChildrenHandler(cs), c.platform))
	if err := images.Walk(ctx, handler, i.Target); err != nil {
		if errdefs.IsNotFound(err) {
			return bad("image %s: a part is missing or damaged: %w", i.Name, err)
		}
		return c.parseError(i.Name, err)
	}
	available, _, _, missing, err := images.Check(ctx, cs, i.Target, c.platform)
	switch {
	case errdefs.IsNotFound(err) || err == nil && !available:
		return bad("image %s is not for %s but for %s", i.Name, platforms.Format(platforms.DefaultSpec()), c.forWhat(ctx, i))
	case err != nil:
		return c.parseError(i.Name, err)
	case len(missing) > 0:
		return bad("image %s: %d parts are missing or damaged, such as %s", i.Name, len(missing), missing[0].Digest)
	}
	p, err := images.Platforms(ctx, cs, i.Target)
	if err != nil {
		return c.parseError(i.Name, err)
	}
	if len(p) > 0 && !slices.ContainsFunc(p, c.platform.Match) {
		return bad("image %s is not for %s but for %s", i.Name, platforms.Format(platforms.DefaultSpec()), c.forWhat(ctx, i))
	}
	return nil
}

func (c *Client) parseError(name string, err error) error {
	if e := c.explain(err); e != err { //nolint:errorlint // whether it is another
		return fmt.Errorf("image %s: %w", name, e)
	}
	return bad("image %s: %w", name, err)
}

// forWhat names the platforms of an image.
func (c *Client) forWhat(ctx context.Context, i images.Image) string {
	ps, err := images.Platforms(ctx, c.c.ContentStore(), i.Target)
	if err != nil || len(ps) == 0 {
		return "another platform"
	}
	var names []string
	for _, p := range ps {
		names = append(names, platforms.Format(p))
	}
	return strings.Join(names, ", ")
}

// imageName is the name that a manifest of an archive goes by, as a pod would
// have it after the CRI has completed it; empty where there is none.
func imageName(annotations map[string]string) (string, error) {
	name := annotations[images.AnnotationImageName]
	if name == "" {
		// With OCI it may be the whole name or just the tag.
		if name = annotations[ocispec.AnnotationRefName]; !strings.ContainsAny(name, ":/") {
			return "", nil
		}
	}
	ref, err := reference.ParseDockerRef(name)
	if err != nil {
		return "", bad("image name %q: %w", name, err)
	}
	return ref.String(), nil
}
