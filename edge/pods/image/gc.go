package image

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// collectEvery is the kubelet's ImageGCPeriod.
const collectEvery = 5 * time.Minute

// collector remembers when images were seen and used.
type collector struct {
	sync.Mutex                    // held during a collection
	records    map[string]*record // by image ID
}

type record struct {
	id       string
	detected time.Time
	used     time.Time // zero: never seen in use
	size     int64     // bytes
}

// Run collects images every 5 minutes until ctx ends.
func (m *Images) Run(ctx context.Context) {
	tick := time.NewTicker(collectEvery)
	defer tick.Stop()
	failed := false
	for {
		err := m.Collect(ctx)
		if ctx.Err() != nil {
			return
		}
		if err != nil {
			m.log.Warn("unused images could not be collected; it is tried again", "err", err)
			if failed { // as the kubelet: not the first time
				m.cfg.NodeEvent(corev1.EventTypeWarning, "ImageGCFailed", err.Error())
			}
		}
		failed = err != nil
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// Collect notes which images are used and, where their file system is filled to
// High percent, removes unused ones, those that were used longest ago first, to
// get down to Low. It is an error if that does not suffice.
func (m *Images) Collect(ctx context.Context) error {
	m.collector.Lock()
	defer m.collector.Unlock()
	now := m.cfg.Now()
	unused, err := m.unused(ctx, now)
	if err != nil || m.cfg.High == 100 {
		return err
	}
	info, err := m.cfg.Runtime.ImageFsInfo(ctx)
	if err != nil {
		return fmt.Errorf("ask the runtime where its images are: %w", err)
	}
	if len(info.GetImageFilesystems()) == 0 {
		return errors.New("the runtime does not say where its images are")
	}
	at := info.ImageFilesystems[0].GetFsId().GetMountpoint()
	capacity, available, err := m.cfg.Stat(at)
	if err != nil {
		return fmt.Errorf("space for images at %s: %w", at, err)
	}
	if capacity == 0 {
		err := errors.New("invalid capacity 0 on image filesystem")
		m.cfg.NodeEvent(corev1.EventTypeWarning, "InvalidDiskCapacity", err.Error())
		return err
	}
	available = min(available, capacity)
	usage := 100 - int(available*100/capacity)
	if usage < m.cfg.High {
		return nil
	}
	want := int64(capacity)*int64(100-m.cfg.Low)/100 - int64(available)
	m.log.Info("the file system of the images is filling up: removing unused images", "percent", usage, "high", m.cfg.High, "low", m.cfg.Low, "bytes", want)
	freed, err := m.free(ctx, unused, want, now)
	if err != nil {
		return err
	}
	if freed < want {
		err := fmt.Errorf("Insufficient free disk space on the node's image filesystem (%d%% of %s used). "+ //nolint:staticcheck // the kubelet's words
			"Failed to free sufficient space by deleting unused images (freed %d bytes). "+
			"Investigate disk usage, as it could be used by active images, logs, volumes, or other data.", usage, size(capacity), freed)
		m.cfg.NodeEvent(corev1.EventTypeWarning, "FreeDiskSpaceFailed", err.Error())
		return err
	}
	return nil
}

// FreeSpace removes unused images until so many bytes are free, as the runtime
// counts them, and gives how many there were. [math.MaxInt64] removes all.
func (m *Images) FreeSpace(ctx context.Context, bytes int64) (freed int64, err error) {
	m.collector.Lock()
	defer m.collector.Unlock()
	now := m.cfg.Now()
	unused, err := m.unused(ctx, now)
	if err != nil {
		return 0, err
	}
	return m.free(ctx, unused, bytes, now)
}

// unused brings the records up to date and gives those of images that may go, in
// the order in which they should.
func (m *Images) unused(ctx context.Context, now time.Time) ([]*record, error) {
	pulled := m.pulled() // what arrives from here on need not be in the list
	images, err := m.cfg.Runtime.ListImages(ctx, nil)
	if err != nil {
		return nil, fmt.Errorf("list images: %w", err)
	}
	containers, err := m.cfg.Runtime.ListContainers(ctx, nil)
	if err != nil {
		return nil, fmt.Errorf("list containers: %w", err)
	}
	pause, err := m.sandboxImage(ctx)
	if err != nil {
		return nil, err
	}
	// By ID or by name, whatever the runtime tells.
	needed := map[string]bool{canonical(pause): true}
	for _, d := range m.cfg.Desired() {
		needed[canonical(d)] = true
	}
	running := map[string]bool{}
	for _, c := range containers {
		for _, ref := range []string{c.GetImageId(), c.GetImageRef(), c.GetImage().GetImage()} {
			if ref != "" {
				running[canonical(ref)] = true
			}
		}
	}
	there := make(map[string]*record, len(images))
	var out []*record
	for _, img := range images {
		r := m.collector.records[img.GetId()]
		if r == nil {
			r = &record{id: img.GetId(), detected: now}
		}
		r.size = int64(img.GetSize())
		there[r.id] = r
		names := slices.Concat([]string{r.id}, img.GetRepoTags(), img.GetRepoDigests())
		in := func(set map[string]bool) bool {
			return slices.ContainsFunc(names, func(n string) bool { return set[n] })
		}
		if in(running) {
			r.used = now
		} else if !img.GetPinned() && !in(needed) {
			out = append(out, r)
		}
	}
	m.collector.records = there
	m.forgetAccess(slices.DeleteFunc(pulled, func(id string) bool { return there[id] != nil })...)
	slices.SortFunc(out, func(a, b *record) int {
		return cmp.Or(a.used.Compare(b.used), a.detected.Compare(b.detected), cmp.Compare(a.id, b.id))
	})
	return out, nil
}

// free removes images until so many bytes are free. It goes on after an error.
func (m *Images) free(ctx context.Context, unused []*record, want int64, now time.Time) (freed int64, _ error) {
	var errs []error
	for _, r := range unused {
		if freed >= want {
			break
		}
		if now.Sub(r.detected) < m.cfg.MinAge {
			continue // it may have been pulled for a container that is not there yet
		}
		if err := m.cfg.Runtime.RemoveImage(ctx, &runtimeapi.ImageSpec{Image: r.id}); err != nil {
			errs = append(errs, err)
			continue
		}
		m.log.Info("removed an unused image", "image", r.id, "bytes", r.size)
		m.collected.Inc()
		delete(m.collector.records, r.id)
		m.forgetAccess(r.id)
		freed += r.size
	}
	if len(errs) > 0 {
		return freed, fmt.Errorf("wanted to free %d bytes, but freed %d bytes space with errors in image deletion: %w", want, freed, errors.Join(errs...))
	}
	return freed, nil
}

// sandboxImage gives the image of the sandboxes themselves, which no container
// shows: containerd 1.6 does not pin it, and offline nobody could bring it back.
func (m *Images) sandboxImage(ctx context.Context) (string, error) {
	st, err := m.cfg.Runtime.Status(ctx, true)
	if err != nil {
		return "", fmt.Errorf("ask the runtime for its sandbox image: %w", err)
	}
	var c struct {
		SandboxImage string `json:"sandboxImage"`
	}
	if info := st.GetInfo()["config"]; info != "" {
		if err := json.Unmarshal([]byte(info), &c); err != nil {
			return "", fmt.Errorf("ask the runtime for its sandbox image: %w", err)
		}
	}
	return c.SandboxImage, nil // empty where the runtime pins it
}

func statfs(path string) (capacity, available uint64, err error) {
	var st unix.Statfs_t
	if err := unix.Statfs(path, &st); err != nil {
		return 0, 0, err
	}
	return st.Blocks * uint64(st.Bsize), st.Bavail * uint64(st.Bsize), nil
}

// size is bytes for people, as the kubelet writes them.
func size(bytes uint64) string {
	if bytes < 1<<10 {
		return fmt.Sprintf("%d B", bytes)
	}
	n, unit := float64(bytes)/(1<<10), "KiB"
	for _, next := range []string{"MiB", "GiB", "TiB"} {
		if n < 1<<10 {
			break
		}
		n, unit = n/(1<<10), next
	}
	return fmt.Sprintf("%.1f %s", n, unit)
}
