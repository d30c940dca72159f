package testruntime

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path"
	"runtime"
	"slices"
	"strings"
)

// The images that every runtime has.
const (
	Pause   = "fairlead.test/pause:1"
	Busybox = "fairlead.test/busybox:1"
)

// busybox is Debian's static one.
const busybox = "/bin/busybox"

// File is a file of an image: a symbolic link where Link is set, a folder where
// Path ends in a slash.
type File struct {
	Path string // absolute
	Mode int64  // 0755 where it is 0
	Body []byte
	Link string
}

// Config is an image's configuration, named as in the OCI image specification.
type Config struct {
	User         string              `json:",omitempty"`
	ExposedPorts map[string]struct{} `json:",omitempty"`
	Env          []string            `json:",omitempty"`
	Entrypoint   []string            `json:",omitempty"`
	Cmd          []string            `json:",omitempty"`
	Volumes      map[string]struct{} `json:",omitempty"`
	WorkingDir   string              `json:",omitempty"`
	Labels       map[string]string   `json:",omitempty"`
	StopSignal   string              `json:",omitempty"`
}

// BusyboxFiles are the files of a small system: busybox and its applets below
// /bin, the users root, app (1000) and nobody (65534), and the usual folders.
func BusyboxFiles() ([]File, error) {
	program, err := os.ReadFile(busybox)
	if err != nil {
		return nil, err
	}
	applets, err := exec.Command(busybox, "--list").Output()
	if err != nil {
		return nil, fmt.Errorf("busybox --list: %w", err)
	}
	files := []File{
		{Path: "/bin/"}, {Path: "/dev/"}, {Path: "/etc/"}, {Path: "/proc/"},
		{Path: "/sys/"}, {Path: "/tmp/", Mode: 0o1777}, {Path: "/var/"},
		{Path: "/bin/busybox", Body: program},
		{Path: "/etc/passwd", Mode: 0o644, Body: []byte("root:x:0:0:root:/:/bin/sh\napp:x:1000:1000:app:/tmp:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n")},
		{Path: "/etc/group", Mode: 0o644, Body: []byte("root:x:0:\napp:x:1000:\nextra:x:2000:app\nnogroup:x:65534:\n")},
	}
	for a := range strings.FieldsSeq(string(applets)) {
		if a != "busybox" {
			files = append(files, File{Path: "/bin/" + path.Base(a), Link: "busybox"})
		}
	}
	return files, nil
}

// Image makes an OCI archive (a tar file) of one image with one layer, for this
// machine's architecture. The same input gives the same bytes.
func Image(name string, files []File, cfg Config) ([]byte, error) {
	var layer bytes.Buffer
	w := tar.NewWriter(&layer)
	for _, f := range files {
		h := &tar.Header{Name: strings.TrimPrefix(f.Path, "/"), Mode: f.Mode, Format: tar.FormatPAX}
		if h.Mode == 0 {
			h.Mode = 0o755
		}
		switch {
		case f.Link != "":
			h.Typeflag, h.Linkname = tar.TypeSymlink, f.Link
		case strings.HasSuffix(f.Path, "/"):
			h.Typeflag = tar.TypeDir
		default:
			h.Typeflag, h.Size = tar.TypeReg, int64(len(f.Body))
		}
		if err := w.WriteHeader(h); err != nil {
			return nil, fmt.Errorf("image %s: %s: %w", name, f.Path, err)
		}
		if _, err := w.Write(f.Body); err != nil {
			return nil, fmt.Errorf("image %s: %s: %w", name, f.Path, err)
		}
	}
	if err := w.Close(); err != nil {
		return nil, fmt.Errorf("image %s: %w", name, err)
	}

	a := ociArchive{blobs: map[string][]byte{}}
	config := a.put("application/vnd.oci.image.config.v1+json", mustJSON(map[string]any{
		"architecture": runtime.GOARCH, "os": "linux", "config": cfg,
		"rootfs": map[string]any{"type": "layers", "diff_ids": []string{digest(layer.Bytes())}},
	}))
	manifest := a.put("application/vnd.oci.image.manifest.v1+json", mustJSON(map[string]any{
		"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
		"config": config, "layers": []descriptor{a.put("application/vnd.oci.image.layer.v1.tar", layer.Bytes())},
	}))
	manifest.Annotations = map[string]string{"io.containerd.image.name": name, "org.opencontainers.image.ref.name": name[strings.LastIndex(name, ":")+1:]}
	return a.tar(mustJSON(map[string]any{"schemaVersion": 2, "manifests": []descriptor{manifest}}))
}

type descriptor struct {
	MediaType   string            `json:"mediaType"`
	Digest      string            `json:"digest"`
	Size        int               `json:"size"`
	Annotations map[string]string `json:"annotations,omitempty"`
}

// ociArchive is an OCI image layout in the making: blobs by file name.
type ociArchive struct{ blobs map[string][]byte }

func (a *ociArchive) put(mediaType string, b []byte) descriptor {
	d := digest(b)
	a.blobs["blobs/sha256/"+strings.TrimPrefix(d, "sha256:")] = b
	return descriptor{MediaType: mediaType, Digest: d, Size: len(b)}
}

func (a *ociArchive) tar(index []byte) ([]byte, error) {
	a.blobs["oci-layout"] = []byte(`{"imageLayoutVersion":"1.0.0"}`)
	a.blobs["index.json"] = index
	names := make([]string, 0, len(a.blobs))
	for name := range a.blobs {
		names = append(names, name)
	}
	slices.Sort(names)
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	for _, name := range names {
		if err := w.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(a.blobs[name]))}); err != nil {
			return nil, err
		}
		if _, err := w.Write(a.blobs[name]); err != nil {
			return nil, err
		}
	}
	return out.Bytes(), w.Close()
}

func digest(b []byte) string {
	sum := sha256.Sum256(b)
	return "sha256:" + hex.EncodeToString(sum[:])
}

func mustJSON(v any) []byte {
	b, err := json.Marshal(v)
	if err != nil {
		panic(err) // maps, strings and numbers only
	}
	return b
}

// standard makes the archives of Pause and Busybox.
func standard() ([][]byte, error) {
	files, err := BusyboxFiles()
	if err != nil {
		return nil, err
	}
	// As the first process of a shared process namespace it also reaps.
	pause, err := Image(Pause, []File{{Path: "/bin/"}, {Path: "/bin/busybox", Body: body(files, "/bin/busybox")}}, Config{
		User:       "65534:65534",
		Entrypoint: []string{"/bin/busybox", "sh", "-c", "trap 'exit 0' TERM INT; while :; do busybox sleep 2147483647 & wait $!; done"},
	})
	if err != nil {
		return nil, err
	}
	system, err := Image(Busybox, files, Config{Env: []string{"PATH=/bin"}, Cmd: []string{"sh"}})
	if err != nil {
		return nil, err
	}
	return [][]byte{pause, system}, nil
}

func body(files []File, name string) []byte {
	return files[slices.IndexFunc(files, func(f File) bool { return f.Path == name })].Body
}
