package driver_test

import (
	"errors"
	"math"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/fairlead-io/fairlead/mappers/driver"
	"github.com/fairlead-io/fairlead/schemas/device"
	"github.com/fairlead-io/fairlead/schemas/payload"
	"github.com/fairlead-io/fairlead/schemas/topic"
)

const (
	temp  = `{"name":"temp","type":"float64","pollInterval":"1s"}`
	speed = `{"name":"speed","type":"int32","access":"rw","min":0,"max":100,"pollInterval":"1s"}`
	order = `{"name":"order","type":"string","access":"wo"}`

	online  = `{"uid":"u-pump","rev":1,"state":"Online","mapper":"fake"}`
	offline = `{"uid":"u-pump","rev":1,"state":"Offline","error":"no reply in time","mapper":"fake"}`
)

// settle is when a mapper has started its devices.
const settle = 150 * time.Millisecond

func TestReportsOnChange(t *testing.T) {
	inHouse(t, func(h *house) {
		h.device("pump", 1, temp)
		h.set("temp", 21.5)
		h.start()
		h.sleep(settle)
		h.expect("first read", `temp {"v":21.5}`, "pump "+online)
		h.sleep(10 * time.Second)
		h.expect("nothing changed")
		if n := len(h.reads()); n != 11 {
			t.Errorf("%d reads in 10 s; want 11", n)
		}
		h.set("temp", 21.6)
		h.sleep(time.Second)
		h.expect("changed", `temp {"v":21.6}`)
	})
}

func TestDeadband(t *testing.T) {
	inHouse(t, func(h *house) {
		h.device("pump", 1, `{"name":"temp","type":"float64","deadband":0.5}`)
		h.set("temp", 20.0)
		h.start()
		h.sleep(settle)
		h.bus.published()
		for _, v := range []float64{20.4, 19.6, 20.3} {
			h.set("temp", v)
			h.sleep(time.Second)
		}
		h.expect("within the deadband")
		h.set("temp", 20.5) // measured from what was reported, so that drift shows
		h.sleep(time.Second)
		h.expect("beyond", `temp {"v":20.5}`)
	})
}

func TestBadQualityKeepsTheLastValueAndRecovers(t *testing.T) {
	inHouse(t, func(h *house) {
		h.device("pump", 1, temp)
		h.set("temp", 3.2)
		h.start()
		h.sleep(settle)
		h.bus.published()
		h.fault("*", errTimeout)
		h.sleep(20 * time.Second)
		h.expect("silent", `temp {"v":null,"lv":3.2,"q":"bad:timeout"}`, "pump "+offline)
		h.fault("*", nil)
		h.sleep(2500 * time.Millisecond) // the pause is at most twice the interval, and 20 %
		h.expect("back, with the same value", `temp {"v":3.2}`, "pump "+online)
	})
}

func TestOneBadProperty(t *testing.T) {
	inHouse(t, func(h *house) {
		h.device("pump", 1, temp+","+speed)
		h.set("temp", math.NaN())
		h.set("speed", int64(5))
		h.start()
		h.sleep(settle)
		h.expect("NaN is no value", `temp {"v":null,"q":"bad:value"}`, `speed {"v":5}`,
			`pump {"uid":"u-pump","rev":1,"state":"Error","error":"temp: the device's answer is not a finite number","mapper":"fake"}`)
		h.set("temp", 1.0)
		h.sleep(time.Second)
		h.expect("good", `temp {"v":1}`, "pump "+online)
	})
}

func TestSlowPropertyRecoversWithTheDevice(t *testing.T) {
	inHouse(t, func(h *house) {
		h.device("pump", 1, temp+`,{"name":"hours","type":"uint32","pollInterval":"10s"}`)
		h.set("temp", 1.0)
		h.set("hours", uint64(7))
		h.start()
		h.sleep(settle + 9*time.Second)
		h.fault("*", errTimeout)
		h.sleep(5 * time.Second)
		h.bus.published()
		h.fault("*", nil)
		h.sleep(2500 * time.Millisecond)
		h.expect("both at once", `temp {"v":1}`, `hours {"v":7}`, "pump "+online)
	})
}

func TestDueTogetherAreReadTogether(t *testing.T) {
	inHouse(t, func(h *house) {
		h.device("pump", 1, temp+`,{"name":"flow","type":"float32","pollInterval":"2s"},`+order)
		h.set("temp", 1.0)
		h.set("flow", 2.0)
		h.start()
		h.sleep(settle + 4*time.Second)
		want := []string{"temp+flow", "temp", "temp+flow", "temp", "temp+flow"}
		if got := h.reads(); !slices.Equal(got, want) {
			t.Errorf("got %q; want %q", got, want)
		}
	})
}

func TestSlowDeviceSkipsTicksAndGoesStale(t *testing.T) {
	inHouse(t, func(h *house) {
		h.device("pump", 1, `{"name":"temp","type":"float64","pollInterval":"1s","maxAge":"2s"}`)
		h.set("temp", 1.0)
		h.start()
		h.sleep(settle)
		h.expect("first", `temp {"v":1}`, "pump "+online)
		h.reads()
		h.drv.do(func() { h.drv.mu.delay = 3500 * time.Millisecond })
		h.sleep(2 * time.Second)
		h.expect("stale", `temp {"v":null,"lv":1,"q":"bad:stale"}`,
			`pump {"uid":"u-pump","rev":1,"state":"Error","error":"temp: no value within its maximum age","mapper":"fake"}`)
		h.sleep(2600 * time.Millisecond)
		h.expect("read at last", `temp {"v":1}`, "pump "+online)
		if n := len(h.reads()); n > 2 {
			t.Errorf("%d reads in 4.6 s of a device that takes 3.5 s", n)
		}
	})
}

func TestWriteAcksWithRev(t *testing.T) {
	inHouse(t, func(h *house) {
		h.device("pump", 1, speed+","+order)
		h.set("speed", int64(10))
		h.start()
		h.sleep(settle)
		h.bus.published()
		h.target("pump", "speed", 1000, "40")
		synctest.Wait() // without any time passing: writes do not wait for a tick
		h.expect("applied", `speed {"v":40,"ack":1000}`)
		h.target("pump", "order", 1001, `"start"`)
		synctest.Wait()
		h.expect("write only", `order {"v":"start","ack":1001}`)
		h.set("speed", int64(50))
		h.sleep(time.Second)
		h.expect("the ack stays", `speed {"v":50,"ack":1000}`)
		if got := h.writes(); got != "speed=40 order=start" {
			t.Errorf("writes: %s", got)
		}
	})
}

func TestTargetsRefused(t *testing.T) {
	for _, c := range []struct {
		name, property, target string
		refuse                 error
		actual                 any
		want                   string
	}{
		{"range", speed, "101", nil, nil, `{"v":10,"ack":9,"err":"range"}`},
		{"type", speed, `"fast"`, nil, nil, `{"v":10,"ack":9,"err":"type"}`},
		{"access", `{"name":"speed","type":"int32"}`, "1", nil, nil, `{"v":10,"ack":9,"err":"access"}`},
		{"device", speed, "1", errors.New("no"), nil, `{"v":10,"ack":9,"err":"device"}`},
		{"refused as a value", speed, "1", device.Refuse(device.ReasonEnum, "no"), nil, `{"v":10,"ack":9,"err":"enum"}`},
		{"readback", speed, "1", nil, int64(11), `{"v":11,"ack":9,"err":"readback"}`},
	} {
		t.Run(c.name, func(t *testing.T) {
			inHouse(t, func(h *house) {
				h.device("pump", 1, c.property)
				h.set("speed", int64(10))
				h.start()
				h.sleep(settle)
				h.bus.published()
				h.drv.do(func() { h.drv.mu.refuse["speed"], h.drv.mu.actual = c.refuse, c.actual })
				h.target("pump", "speed", 9, c.target)
				synctest.Wait()
				h.expect(c.name, "speed "+c.want)
			})
		})
	}
}

func TestWriteIsRetriedUntilItSucceedsIsReplacedOrExpires(t *testing.T) {
	inHouse(t, func(h *house) {
		h.device("pump", 1, speed)
		h.set("speed", int64(10))
		h.start()
		h.sleep(settle)
		h.fault("*", errTimeout)
		h.target("pump", "speed", 1, "20")
		h.sleep(5 * time.Second)
		if n := strings.Count(h.writes(), "speed=20"); n < 3 || n > 10 {
			t.Errorf("%d tries in 5 s", n)
		}
		h.target("pump", "speed", 2, "30")
		h.sleep(time.Second)
		h.bus.published()
		h.fault("*", nil)
		h.sleep(2500 * time.Millisecond)
		// Whether the poll or the write comes back first is up to the jitter.
		if got := h.bus.published(); !slices.Contains(got, `speed {"v":30,"ack":2}`) || !slices.Contains(got, "pump "+online) {
			t.Errorf("published %q", got)
		}
		if got := h.writes(); !strings.HasSuffix(got, "speed=30") || strings.Contains(got, "speed=20") {
			t.Errorf("writes: %s", got)
		}
		h.fault("*", errTimeout)
		h.bus.put(topic.ReportedTarget(node, "default", "pump", "speed"), payload.Target{
			V: []byte("40"), Rev: 3, UID: "u-pump", By: payload.ByLocal, Exp: time.Now().Add(3 * time.Second).UnixMilli()})
		h.sleep(4 * time.Second)
		h.fault("*", nil)
		h.sleep(3 * time.Second)
		if v := h.bus.get(twin("pump", "speed")); !strings.Contains(v, `"ack":2`) {
			t.Errorf("an expired target was applied: %s", v)
		}
	})
}

func TestTargetsThatAreNotOurs(t *testing.T) {
	inHouse(t, func(h *house) {
		h.device("pump", 1, speed)
		h.set("speed", int64(10))
		h.start()
		h.sleep(settle)
		h.bus.put(topic.ReportedTarget(node, "default", "pump", "speed"), payload.Target{V: []byte("1"), Rev: 5, UID: "another"})
		h.bus.put(topic.ReportedTarget(node, "default", "pump", "colour"), payload.Target{V: []byte("1"), Rev: 5, UID: "u-pump"})
		h.bus.put(topic.ReportedTarget(node, "default", "pump", "speed"), "{")
		h.target("ghost", "speed", 5, "1")
		h.sleep(time.Second)
		if got := h.writes(); got != "" {
			t.Errorf("writes: %s", got)
		}
	})
}

// TestRestart: a mapper that restarts takes its acks and last values from the
// bus: nothing is written or published again.
func TestRestart(t *testing.T) {
	inHouse(t, func(h *house) {
		h.device("pump", 1, speed+","+temp)
		h.set("speed", int64(10))
		h.set("temp", 4.0)
		h.start()
		h.sleep(settle)
		h.target("pump", "speed", 7, "40")
		h.sleep(time.Second)
		h.stop()
		h.bus.published()
		h.writes()
		h.start()
		h.sleep(settle + 5*time.Second)
		h.expect("same again")
		if got := h.writes(); got != "" {
			t.Errorf("written again: %s", got)
		}
		h.stop()
		h.target("pump", "speed", 8, "50") // while the mapper is away
		h.fault("temp", errTimeout)
		h.start()
		h.sleep(settle)
		h.expect("caught up", `speed {"v":50,"ack":8}`, `temp {"v":null,"lv":4,"q":"bad:timeout"}`,
			`pump {"uid":"u-pump","rev":1,"state":"Error","error":"temp: no reply in time","mapper":"fake"}`)
	})
}

func TestBusAway(t *testing.T) {
	inHouse(t, func(h *house) {
		h.device("pump", 1, temp+","+speed)
		h.device("tank", 1, temp)
		h.set("temp", 1.0)
		h.set("speed", int64(10))
		h.start()
		h.sleep(settle)
		h.bus.published()
		h.bus.cut()
		h.reads()
		for i := range 5 { // conflated: only the last is of interest
			h.set("temp", 2.0+float64(i))
			h.sleep(time.Second)
		}
		if n := len(h.reads()); n != 10 {
			t.Errorf("%d reads of two devices in 5 s without a bus; want 10", n)
		}
		// Meanwhile a device is deleted, a target set, a reading lost.
		h.bus.put(topic.DesiredDevice(node, "default", "tank"), nil)
		h.bus.put(twin("pump", "speed"), nil)
		h.target("pump", "speed", 3, "99")
		h.drv.do(func() { h.drv.mu.refuse["speed"] = errTimeout })
		h.bus.connect()
		synctest.Wait()
		h.expect("what changed, at once", `temp {"v":6}`, `temp {"v":6}`)
		if got := h.writes(); got != "speed=99" {
			t.Errorf("writes: %s", got)
		}
		h.sleep(4 * time.Second)
		h.expect("what the bus lost, when it is quiet", `speed {"v":10}`)
		if c := h.drv.mu.closes; c != 1 {
			t.Errorf("%d devices closed; want the deleted one", c)
		}
		h.bus.cut()
		h.sleep(time.Second)
		h.bus.connect()
		h.sleep(5 * time.Second)
		h.expect("reconnected with everything in sync")
		if o := h.drv.mu.opens; o != 2 {
			t.Errorf("%d opens; a reconnect must not touch devices", o)
		}
	})
}

func TestReload(t *testing.T) {
	inHouse(t, func(h *house) {
		h.device("pump", 1, temp)
		h.device("tank", 1, temp)
		h.set("temp", 1.0)
		h.start()
		h.sleep(settle)
		h.bus.published()
		h.device("pump", 2, strings.Replace(temp, "{", `{"description":"inlet",`, 1))
		h.sleep(500 * time.Millisecond)
		h.expect("words for people", strings.Replace("pump "+online, `"rev":1`, `"rev":2`, 1))
		h.device("pump", 1, speed) // an older rev
		h.sleep(500 * time.Millisecond)
		if o, c := h.drv.mu.opens, h.drv.mu.closes; o != 2 || c != 0 {
			t.Errorf("%d opens, %d closes; want 2 and 0", o, c)
		}
		h.set("speed", int64(1))
		h.device("pump", 3, temp+","+speed)
		h.sleep(500 * time.Millisecond)
		h.expect("a new property; the value that stands is not repeated", `speed {"v":1}`, strings.Replace("pump "+online, `"rev":1`, `"rev":3`, 1))
		if o, c := h.drv.mu.opens, h.drv.mu.closes; o != 3 || c != 1 {
			t.Errorf("%d opens, %d closes; want only the changed device restarted", o, c)
		}
		h.bus.put(topic.DesiredDevice(node, "default", "pump"), nil)
		h.sleep(500 * time.Millisecond)
		h.bus.put(twin("pump", "temp"), nil) // the node cleans up
		h.sleep(5 * time.Second)
		h.expect("removed: nothing is brought back")
		h.bus.put(twin("tank", "temp"), nil)
		h.sleep(time.Second)
		h.expect("cleared by mistake: brought back", `temp {"v":1}`)
	})
}

func TestForeignAndMalformed(t *testing.T) {
	inHouse(t, func(h *house) {
		h.bus.put(topic.DesiredDevice(node, "default", "other"), device.Device{Namespace: "default", Name: "other", Protocol: "serial"})
		h.bus.put(topic.DesiredDevice(node, "default", "broken"), `{"rev":`)
		h.bus.put(topic.DesiredDevice(node, "default", "liar"), device.Device{Namespace: "default", Name: "pump", Protocol: "fake"})
		h.device("pump", 1, temp+`,{"name":"bad name","type":"bool"}`)
		h.set("temp", 1.0)
		h.start()
		h.sleep(settle)
		h.expect("the good one", `temp {"v":1}`, "pump "+online)
		h.bus.put(topic.DesiredDevice(node, "default", "pump"), `not JSON`)
		h.sleep(time.Second)
		if c := h.drv.mu.closes; c != 0 {
			t.Error("a malformed payload stopped a device")
		}
	})
}

func TestConfigThatCannotWork(t *testing.T) {
	inHouse(t, func(h *house) {
		h.drv.mu.openErr = errors.New("no address")
		h.device("pump", 1, speed+","+order)
		h.start()
		h.sleep(settle + 5*time.Second)
		h.expect("said once", `speed {"v":null,"q":"bad:config"}`, `order {"v":null,"q":"bad:config"}`,
			`pump {"uid":"u-pump","rev":1,"state":"Error","error":"speed: no address","mapper":"fake"}`)
		h.target("pump", "speed", 4, "1")
		h.sleep(time.Second)
		h.expect("a target", `speed {"v":null,"q":"bad:config","ack":4,"err":"config"}`)
		h.drv.do(func() { h.drv.mu.openErr = nil })
		h.set("speed", int64(1))
		h.device("pump", 2, speed)
		h.sleep(time.Second)
		h.expect("repaired", `speed {"v":1,"ack":4,"err":"config"}`, strings.Replace("pump "+online, `"rev":1`, `"rev":2`, 1))
	})
}

func TestSlowAndRefusingBus(t *testing.T) {
	inHouse(t, func(h *house) {
		h.device("pump", 1, temp+","+speed)
		h.set("speed", int64(1))
		h.set("temp", 0.0)
		h.bus.mu.slow = make(chan struct{})
		h.bus.mu.refuse = twin("pump", "speed")
		h.start()
		h.sleep(settle)
		for i := range 5 {
			h.set("temp", float64(i))
			h.sleep(time.Second)
		}
		if n := len(h.reads()); n < 5 {
			t.Errorf("%d reads: a slow bus holds polling back", n)
		}
		close(h.bus.mu.slow)
		synctest.Wait()
		h.expect("at most the one under way and the newest", `temp {"v":0}`, `temp {"v":4}`, "pump "+online)
	})
}

func TestRunRefusesConfig(t *testing.T) {
	for _, c := range []struct {
		cfg  driver.Config
		want string
	}{
		{driver.Config{Bus: "mqtt://127.0.0.1:1"}, "node"},
		{driver.Config{Node: "a/b", Bus: "mqtt://127.0.0.1:1"}, "node"},
		{driver.Config{Node: node}, "bus"},
		{driver.Config{Node: node, Bus: "mqtt://127.0.0.1:1", Name: "A"}, "mapper"},
		{driver.Config{Node: node, Bus: "mqtt://127.0.0.1:1", TokenFile: "/nonexistent"}, "/nonexistent"},
		{driver.Config{Node: node, Bus: "gopher://x"}, "gopher"},
	} {
		if err := driver.Run(t.Context(), c.cfg, newFakeDriver()); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%+v: got %v; want an error that names %q", c.cfg, err, c.want)
		}
	}
	if err := driver.Run(t.Context(), driver.Config{Node: node, Bus: "mqtt://x:1"}); err == nil {
		t.Error("a mapper without a driver runs")
	}
}
