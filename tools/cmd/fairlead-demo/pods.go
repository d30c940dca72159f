package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/fairlead-io/fairlead/tools/testruntime"
)

// mapperSample is the mapper as a container, below the repository's root. Its image
// is made here, of the binary that was built.
const (
	mapperSample = "deploy/samples/modbus-mapper.yaml"
	mapperImage  = "fairlead.dev/mapper:dev"
)

// runtime starts the node's container runtime, where this machine can have one.
func (d *demo) runtime() error {
	rt, err := d.stack.NewRuntime()
	if errors.Is(err, testruntime.ErrMissing) {
		d.screen.print(fmt.Sprintf("the mapper runs as a process, and the edge node runs no pods: %v", err))
		return nil
	}
	if err != nil {
		return fmt.Errorf("container runtime: %w", err)
	}
	d.edge.Runtime, d.at.pods = rt, true
	delete(d.parts, "mapper")
	return d.mapperImage()
}

// mapperImage makes the mapper's image and imports it.
func (d *demo) mapperImage() error {
	program, err := os.ReadFile(filepath.Join(d.bin, "fairlead-mapper"))
	if err != nil {
		return err
	}
	archive, err := testruntime.Image(mapperImage, []testruntime.File{{Path: "/fairlead-mapper", Body: program}},
		testruntime.Config{Entrypoint: []string{"/fairlead-mapper"}})
	if err != nil {
		return fmt.Errorf("the mapper's image: %w", err)
	}
	if err := d.edge.Runtime.Import(archive); err != nil {
		return fmt.Errorf("the mapper's image: %w", err)
	}
	return nil
}

// podFlags are the agent's, for a node that runs pods.
func (d *demo) podFlags() []string {
	rt := d.edge.Runtime
	if rt == nil {
		return nil
	}
	return []string{
		"--runtime", rt.Socket, "--cgroup-root", rt.Cgroup, "--pod-logs", filepath.Join(rt.Dir, "logs"),
		// A developer's disk is often too full for the default thresholds.
		"--eviction-hard", "memory.available=100Mi,nodefs.available=2%,imagefs.available=2%",
	}
}

// deploy deploys the mapper, as anybody would: with kubectl apply.
func (d *demo) deploy(ctx context.Context) error {
	b, err := os.ReadFile(filepath.Join(d.repo, mapperSample))
	if err != nil {
		return err
	}
	for _, r := range [][2]string{
		{"/var/lib/fairlead/mapper.token", filepath.Join(d.edge.Dir, "mapper.token")},
		{"mqtt://127.0.0.1:1883", "mqtt://" + d.edge.Bus},
	} {
		if !bytes.Contains(b, []byte(r[0])) {
			return fmt.Errorf("%s: no %s in it to be replaced", mapperSample, r[0])
		}
		b = bytes.ReplaceAll(b, []byte(r[0]), []byte(r[1]))
	}
	if _, err := d.stack.KubectlIn(ctx, b, "apply", "--server-side", "--force-conflicts", "-f", "-"); err != nil {
		return fmt.Errorf("%s: %w", mapperSample, err)
	}
	if _, err := d.stack.Kubectl(ctx, "rollout", "status", "daemonset/modbus-mapper", "--timeout=90s"); err != nil {
		pods, _ := d.stack.Kubectl(ctx, "describe", "pods", "-l", "app=modbus-mapper")
		return fmt.Errorf("the mapper's pod does not run: %w\n%s", err, strings.TrimSpace(string(pods)))
	}
	return nil
}
