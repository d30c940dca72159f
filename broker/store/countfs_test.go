package store_test

import (
	"path/filepath"
	"strings"
	"sync"

	"github.com/cockroachdb/pebble/v2/vfs"
)

// countFS counts what is written to a file system and how often it is synced,
// by the kind of file.
type countFS struct {
	vfs.FS
	mu sync.Mutex
	by map[string]*counted
}

type counted struct{ bytes, writes, syncs int64 }

func newCountFS(fs vfs.FS) *countFS { return &countFS{FS: fs, by: map[string]*counted{}} }

func kindOf(name string) string {
	base := filepath.Base(name)
	switch {
	case strings.HasSuffix(base, ".sst"), strings.HasSuffix(base, ".log"):
		return filepath.Ext(base)[1:]
	case strings.HasPrefix(base, "MANIFEST"):
		return "manifest"
	case strings.HasSuffix(base, ".new"):
		return "checkpoint"
	default:
		return "other"
	}
}

func (c *countFS) add(kind string, bytes int, syncs int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	k := c.by[kind]
	if k == nil {
		k = &counted{}
		c.by[kind] = k
	}
	k.bytes += int64(bytes)
	k.syncs += syncs
	if bytes > 0 {
		k.writes++
	}
}

// total sums up all kinds.
func (c *countFS) total() (t counted) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, k := range c.by {
		t.bytes += k.bytes
		t.writes += k.writes
		t.syncs += k.syncs
	}
	return t
}

func (c *countFS) wrap(kind string, f vfs.File, err error) (vfs.File, error) {
	if err != nil {
		return nil, err
	}
	return &countFile{File: f, fs: c, kind: kind}, nil
}

func (c *countFS) Create(name string, cat vfs.DiskWriteCategory) (vfs.File, error) {
	f, err := c.FS.Create(name, cat)
	return c.wrap(kindOf(name), f, err)
}

func (c *countFS) ReuseForWrite(from, to string, cat vfs.DiskWriteCategory) (vfs.File, error) {
	f, err := c.FS.ReuseForWrite(from, to, cat)
	return c.wrap(kindOf(to), f, err)
}

func (c *countFS) OpenReadWrite(name string, cat vfs.DiskWriteCategory, o ...vfs.OpenOption) (vfs.File, error) {
	f, err := c.FS.OpenReadWrite(name, cat, o...)
	return c.wrap(kindOf(name), f, err)
}

func (c *countFS) OpenDir(name string) (vfs.File, error) {
	f, err := c.FS.OpenDir(name)
	return c.wrap("folder", f, err)
}

func (c *countFS) Unwrap() vfs.FS { return c.FS }

type countFile struct {
	vfs.File
	fs   *countFS
	kind string
}

func (f *countFile) Write(b []byte) (int, error) {
	n, err := f.File.Write(b)
	f.fs.add(f.kind, n, 0)
	return n, err
}

func (f *countFile) WriteAt(b []byte, off int64) (int, error) {
	n, err := f.File.WriteAt(b, off)
	f.fs.add(f.kind, n, 0)
	return n, err
}

func (f *countFile) Sync() error {
	f.fs.add(f.kind, 0, 1)
	return f.File.Sync()
}

func (f *countFile) SyncData() error {
	f.fs.add(f.kind, 0, 1)
	return f.File.SyncData()
}

func (f *countFile) SyncTo(n int64) (bool, error) {
	full, err := f.File.SyncTo(n)
	if full {
		f.fs.add(f.kind, 0, 1)
	}
	return full, err
}
