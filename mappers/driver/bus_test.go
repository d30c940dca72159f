package driver_test

import (
	"context"
	"encoding/json"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	mqtt "github.com/mochi-mqtt/server/v2"
	"github.com/mochi-mqtt/server/v2/hooks/auth"
	"github.com/mochi-mqtt/server/v2/listeners"

	"github.com/fairlead-io/fairlead/mappers/driver"
	"github.com/fairlead-io/fairlead/mappers/modbus"
	"github.com/fairlead-io/fairlead/schemas/device"
	"github.com/fairlead-io/fairlead/schemas/payload"
	"github.com/fairlead-io/fairlead/schemas/topic"
	"github.com/fairlead-io/fairlead/tools/testslave"
)

// realBus is a stock broker on a port of its own.
type realBus struct {
	*testing.T
	*mqtt.Server
	addr string
}

// startBus listens on addr; the retained topics given are there from the start.
func startBus(t *testing.T, addr string, retained map[topic.Topic][]byte) *realBus {
	t.Helper()
	s := mqtt.New(&mqtt.Options{InlineClient: true, Logger: slog.New(slog.DiscardHandler)})
	ledger := &auth.Ledger{Auth: auth.AuthRules{{Username: "mapper:modbus", Password: "s3cret", Allow: true}}, ACL: auth.ACLRules{{Username: "mapper:modbus", Filters: auth.Filters{"#": auth.ReadWrite}}}}
	if err := s.AddHook(new(auth.Hook), &auth.Options{Ledger: ledger}); err != nil {
		t.Fatal(err)
	}
	l := listeners.NewTCP(listeners.Config{ID: "bus", Address: addr})
	if err := s.AddListener(l); err != nil {
		t.Fatal(err)
	}
	b := &realBus{T: t, Server: s, addr: l.Address()}
	for topicName, p := range retained {
		b.put(topicName, p)
	}
	if err := s.Serve(); err != nil {
		t.Fatal(err)
	}
	return b
}

func (b *realBus) put(t topic.Topic, p []byte) {
	b.Helper()
	if err := b.Publish(string(t), p, true, 1); err != nil {
		b.Error(err)
	}
}

func (b *realBus) retained() map[topic.Topic][]byte {
	out := map[topic.Topic][]byte{}
	for name, pk := range b.Topics.Retained.GetAll() {
		if topic.Owned(name) {
			out[topic.Topic(name)] = pk.Payload
		}
	}
	return out
}

// await waits until the topic's retained payload contains want.
func (b *realBus) await(t topic.Topic, want string) payload.Reading {
	b.Helper()
	deadline := time.Now().Add(15 * time.Second)
	for {
		pk, ok := b.Topics.Retained.Get(string(t))
		if ok && strings.Contains(string(pk.Payload), want) {
			var r payload.Reading
			_ = payload.Decode(pk.Payload, &r) // a status is none
			return r
		}
		if time.Now().After(deadline) {
			b.Fatalf("%s: got %q; want %q in it", t, pk.Payload, want)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// TestMapperOnARealBus runs the whole mapper: broker, client, kit, Modbus driver
// and a slave that is not ours.
func TestMapperOnARealBus(t *testing.T) {
	slave := testslave.Start(t)
	bus := startBus(t, "127.0.0.1:0", nil)
	defer func() { bus.Close() }()
	token := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(token, []byte("s3cret\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	metrics := make(chan net.Addr, 1)
	go func() {
		done <- driver.Run(ctx, driver.Config{Bus: "mqtt://" + bus.addr, Node: node, TokenFile: token,
			Metrics: "127.0.0.1:0", Listening: func(a net.Addr) { metrics <- a },
			Logger: slog.New(slog.NewTextHandler(t.Output(), nil))}, modbus.New(nil))
	}()
	defer func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	}()

	d := device.Device{UID: "u-plc", Rev: 1, Namespace: "default", Name: "plc", Protocol: modbus.Protocol,
		Modbus: &device.ModbusDevice{Address: slave.Addr, Unit: 1, Timeout: device.Duration(200 * time.Millisecond)}}
	err := json.Unmarshal([]byte(`[
	 {"name":"speed","type":"uint16","access":"rw","max":100,"pollInterval":"50ms","modbus":{"table":"holdingRegister","address":0}},
	 {"name":"temp","type":"float64","pollInterval":"50ms","modbus":{"table":"inputRegister","address":0,"raw":"int16","scale":0.1}}]`), &d.Properties)
	if err != nil {
		t.Fatal(err)
	}
	bus.put(topic.DesiredDevice(node, "default", "plc"), payload.Encode(d))
	slave.Set("input", 0, 215)
	speed, temp, status := twin("plc", "speed"), twin("plc", "temp"), topic.ReportedDevice(node, "default", "plc")
	bus.await(temp, `"v":21.5,`)
	bus.await(status, `"Online"`)

	target := func(rev int64, v string) {
		bus.put(topic.ReportedTarget(node, "default", "plc", "speed"), payload.Encode(payload.Target{
			V: json.RawMessage(v), Rev: rev, UID: "u-plc", By: payload.ByLocal}))
	}
	target(1000, "40")
	bus.await(speed, `"v":40,`)
	bus.await(speed, `"ack":1000`)
	if got := slave.Get("holding", 0)[0]; got != 40 || slave.Writes("holding", 0) != 1 {
		t.Errorf("register %d after %d writes; want 40 after 1", got, slave.Writes("holding", 0))
	}
	target(1001, "101")
	bus.await(speed, `"ack":1001,"err":"range"`)

	slave.Pause()
	if r := bus.await(temp, "bad:timeout"); string(r.V) != "null" || string(r.LV) != "21.5" {
		t.Errorf("paused: %+v; want null, with the last value kept", r)
	}
	bus.await(status, `"Offline"`)
	slave.Resume()
	bus.await(temp, `"v":21.5,`)
	slave.Kill()
	bus.await(temp, "bad:unreachable")
	target(1002, "55")
	if err := slave.Restart(); err != nil {
		t.Fatal(err)
	}
	bus.await(speed, `"ack":1002`)
	bus.await(temp, `"v":0,`)

	// The bus goes away with an old picture and comes back: a target that was
	// set meanwhile is applied, an acknowledged one is not written again, and
	// what the bus forgot is there again.
	old := bus.retained()
	delete(old, temp)
	old[topic.ReportedTarget(node, "default", "plc", "speed")] = payload.Encode(payload.Target{
		V: json.RawMessage("60"), Rev: 1003, UID: "u-plc", By: payload.ByCloud})
	addr := bus.addr
	bus.Close()
	slave.Set("input", 0, 100)
	time.Sleep(200 * time.Millisecond)
	bus = startBus(t, addr, old)
	bus.await(speed, `"ack":1003`)
	bus.await(temp, `"v":10,`)
	if n := slave.Writes("holding", 0); n != 2 { // 1002 and 1003, since its restart
		t.Errorf("%d writes since the slave's restart; want 2", n)
	}

	res, err := http.Get("http://" + (<-metrics).String() + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	page, err := io.ReadAll(res.Body)
	res.Body.Close()
	http.DefaultClient.CloseIdleConnections()
	for _, want := range []string{
		`fairlead_mapper_devices{mapper="modbus",state="Online"} 1`,
		`fairlead_mapper_writes_total{mapper="modbus",result="range"} 1`,
		`fairlead_mapper_polls_total{mapper="modbus",result="silent"}`,
		`fairlead_mapper_bus_up{mapper="modbus"} 1`,
	} {
		if err != nil || !strings.Contains(string(page), want) {
			t.Errorf("metrics: %v, want %s", err, want)
		}
	}
}
