package driver_test

import (
	"context"
	"fmt"
	"os"
	"strconv"
	"strings"

	"github.com/fairlead-io/fairlead/mappers/driver"
	"github.com/fairlead-io/fairlead/schemas/device"
	"github.com/fairlead-io/fairlead/schemas/payload"
)

// files is a driver whose devices are directories, with a file per property.
type files struct{ root string }

func (files) Protocol() string { return "files" }

func (f files) Open(_ context.Context, d *device.Device) (driver.Session, error) {
	for _, p := range d.Properties {
		if p.Type != device.Int64 {
			return nil, driver.ConfigFault("property %s: a file holds an int64, not %s", p.Name, p.Type)
		}
	}
	return directory{f.root + "/" + d.Name}, nil
}

type directory struct{ path string }

func (d directory) Read(_ context.Context, props []*device.Property) []driver.Result {
	out := make([]driver.Result, len(props))
	for i, p := range props {
		out[i].Value, out[i].Err = d.read(p)
	}
	return out
}

func (d directory) read(p *device.Property) (any, error) {
	b, err := os.ReadFile(d.path + "/" + p.Name)
	if err != nil {
		return nil, &driver.Fault{Quality: payload.QualityUnreachable, Err: err}
	}
	n, err := strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64)
	if err != nil {
		return nil, &driver.Fault{Quality: payload.QualityValue, Err: err}
	}
	return n, nil
}

func (d directory) Write(_ context.Context, p *device.Property, v any) (any, error) {
	if err := os.WriteFile(d.path+"/"+p.Name, fmt.Append(nil, v), 0o644); err != nil {
		return nil, &driver.Fault{Quality: payload.QualityUnreachable, Err: err}
	}
	return d.read(p)
}

func (directory) Close() error { return nil }

// A driver says how one device is read and written; driver.Run does the rest:
//
//	err := driver.Run(ctx, driver.Config{Bus: "mqtt://127.0.0.1:1883", Node: "plant-7"}, files{"/srv/devices"})
func ExampleDriver() {
	root, err := os.MkdirTemp("", "")
	if err != nil {
		panic(err)
	}
	defer os.RemoveAll(root)
	if err := os.Mkdir(root+"/pump", 0o755); err != nil {
		panic(err)
	}
	speed := device.Property{Name: "speed", Type: device.Int64, Access: device.ReadWrite}
	pump := &device.Device{Namespace: "default", Name: "pump", Protocol: "files", Properties: []device.Property{speed}}

	s, err := files{root}.Open(context.Background(), pump)
	if err != nil {
		panic(err)
	}
	defer s.Close()
	fmt.Println(s.Write(context.Background(), &speed, int64(40)))
	fmt.Println(s.Read(context.Background(), []*device.Property{&speed})[0].Value)
	// Output:
	// 40 <nil>
	// 40
}
