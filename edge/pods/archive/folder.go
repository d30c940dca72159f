package archive

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/containerd/v2/pkg/namespaces"

	"github.com/fairlead-io/fairlead/edge/pods/archive/folder"
)

// Folder imports the archives of a folder that have not been imported yet, and
// tells result of each: once per content, which is taken to be the same while
// name, size and time are. What was imported is remembered with the images, so an
// archive is imported again where its images were removed. The images are pinned
// for as long as the archive lies in the folder. The error is about the folder as
// a whole.
func (c *Client) Folder(ctx context.Context, dir string, progress func(file string, read, size int64), result func(folder.Result)) error {
	files, err := folder.Archives(dir)
	if err != nil {
		return err
	}
	known, err := c.archives(ctx)
	if err != nil {
		return err
	}
	for _, f := range files {
		info, err := os.Stat(filepath.Join(dir, f))
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		key := fmt.Sprintf("%s;%d;%d", f, info.Size(), info.ModTime().UnixNano())
		if _, ok := known[key]; ok {
			delete(known, key)
			continue
		}
		r := folder.Result{File: f}
		var p func(read, size int64)
		if progress != nil {
			p = func(read, size int64) { progress(f, read, size) }
		}
		images, err := c.ImportFile(ctx, filepath.Join(dir, f), Options{Pin: true, Archive: key}, p)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		for _, i := range images {
			r.Images = append(r.Images, i.Name)
			for k, names := range known { // what it has replaced
				delete(names, i.Name)
				if len(names) == 0 {
					delete(known, k)
				}
			}
		}
		if err != nil {
			var bad *BadArchive
			r.Error, r.Retry = err.Error(), !errors.As(err, &bad)
		}
		result(r)
	}
	return c.forget(ctx, known)
}

// archives gives the images that came from the folder, by what Folder remembers.
func (c *Client) archives(ctx context.Context) (map[string]map[string]bool, error) {
	ctx = namespaces.WithNamespace(ctx, namespace)
	l, err := c.c.ImageService().List(ctx, fmt.Sprintf("labels.%q", labelArchive))
	if err != nil {
		return nil, fmt.Errorf("list the images: %w", c.explain(err))
	}
	out := map[string]map[string]bool{}
	for _, i := range l {
		key := i.Labels[labelArchive]
		if out[key] == nil {
			out[key] = map[string]bool{}
		}
		out[key][i.Name] = true
	}
	return out, nil
}

// forget leaves images whose archive has been taken away to the collector.
func (c *Client) forget(ctx context.Context, known map[string]map[string]bool) error {
	ctx = namespaces.WithNamespace(ctx, namespace)
	for _, names := range known {
		for name := range names {
			if err := c.label(ctx, name, map[string]string{labelArchive: "", labelPinned: ""}); err != nil {
				return fmt.Errorf("unpin image %s: %w", name, c.explain(err))
			}
		}
	}
	return nil
}

// fileOf is the file's name in what Folder remembers.
func fileOf(key string) string {
	for range 2 { // size and time
		if i := strings.LastIndexByte(key, ';'); i >= 0 {
			key = key[:i]
		}
	}
	return key
}
