package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// live shows how the fabric is doing and takes keys and orders until ctx ends.
func (d *demo) live(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel() // ends what waits for the link
	orders := make(chan order)
	stop, err := listen(d.dir, orders)
	if err != nil {
		return err
	}
	defer stop()
	d.screen.print(list(d.at)...)
	var pressed <-chan byte
	if d.screen.terminal {
		var restore func()
		pressed, restore = keys(os.Stdin)
		defer restore()
	}
	every := 10 * time.Second
	if d.screen.terminal {
		every = 500 * time.Millisecond
		if pressed != nil {
			d.screen.print(keysHelp)
		}
	} else {
		d.screen.print("running; stop it with Ctrl-C or `kill $(cat " + d.at.dir + "/fairlead-demo.pid)`")
	}
	defer d.screen.done()
	tick := time.NewTicker(every)
	defer tick.Stop()
	d.screen.status(d.status())
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
			d.screen.status(d.status())
		case e := <-d.died:
			if err := d.lost(e); err != nil {
				return err
			}
		case <-d.cluster():
			return fmt.Errorf("the control plane ended:\n%s", d.stack.Cluster.Tail(5))
		case o := <-orders:
			verb, name, _ := strings.Cut(o.line, " ")
			d.order(ctx, verb, name, o.answer)
		case k := <-pressed:
			if k == 'q' || k == 'Q' {
				return nil
			}
			d.key(ctx, k)
		}
	}
}

// cluster is closed when our control plane ends; nil for somebody else's.
func (d *demo) cluster() <-chan struct{} {
	if d.stack.Cluster == nil {
		return nil
	}
	return d.stack.Cluster.Done()
}

// lost tells that a process ended which nobody here had stopped.
func (d *demo) lost(e death) error {
	p := d.parts[e.part]
	if p.process != e.process || !p.since.IsZero() {
		return nil // we did it, or it is back already
	}
	p.since = time.Now()
	_ = os.Remove(d.pidFile(p))
	d.screen.print(fmt.Sprintf("the %s is gone (%v): %s. Bring it back with: %s", p.name, e.process.Exit(), p.says, d.bringBack(p)))
	return nil
}

func (d *demo) bringBack(p *part) string {
	s := d.at.demo("start " + p.name)
	if k := map[string]string{"cloud": "c", "edge": "e"}[p.name]; k != "" && d.screen.terminal {
		s += "   (or press " + k + ")"
	}
	return s
}

// order does what was asked for and tells what came of it, here and to whoever
// asked; answer may be nil. After a restart that takes until the link is back
// and both sides agree, so it is told by and by.
func (d *demo) order(ctx context.Context, verb, name string, answer chan<- string) {
	tell := func(s string) {
		d.screen.print(strings.TrimPrefix(s, failed))
		if answer != nil {
			answer <- s
		}
	}
	p := d.parts[name]
	switch {
	case p == nil && name == "mapper" && d.at.pods:
		tell(failed + "the mapper is a pod here: " + d.at.dir + "/kubectl delete pod -l app=modbus-mapper ends it, and another one takes its place")
		return
	case p == nil || verb != "start" && verb != "stop":
		tell(failed + fmt.Sprintf("no order %q", verb+" "+name))
		return
	case verb == "start" && p.since.IsZero():
		tell("the " + name + " is up already")
		return
	case verb == "stop" && !p.since.IsZero():
		tell("the " + name + " is down already")
		return
	case verb == "stop":
		d.down(p)
		tell(fmt.Sprintf("the %s is gone: %s. Bring it back with: %s", name, p.says, d.bringBack(p)))
		return
	}
	was := p.since
	if err := d.up(ctx, p); err != nil {
		tell(failed + strings.ReplaceAll(err.Error(), "\n", " · "))
		return
	}
	up := fmt.Sprintf("the %s is up again after %.0f s", name, time.Since(was).Seconds())
	if name != "cloud" && name != "edge" || !d.parts["cloud"].since.IsZero() || !d.parts["edge"].since.IsZero() {
		tell(up)
		return
	}
	d.screen.print(up + "; the link comes back within its back-off")
	began := time.Now()
	d.wg.Go(func() {
		if err := d.bus.agree(ctx, time.Minute); err != nil {
			tell(failed + err.Error())
			return
		}
		d.screen.print(fmt.Sprintf("cloud and edge agree again, %.1f s later", time.Since(began).Seconds()))
		if answer != nil {
			answer <- fmt.Sprintf("%s; cloud and edge agree, %.1f s later", up, time.Since(began).Seconds())
		}
	})
}

// failed begins an answer that is an error.
const failed = "failed: "

func (d *demo) key(ctx context.Context, k byte) {
	toggle := func(name string) {
		verb := "stop"
		if !d.parts[name].since.IsZero() {
			verb = "start"
		}
		d.order(ctx, verb, name, nil)
	}
	switch k {
	case 'c', 'C':
		toggle("cloud")
	case 'e', 'E':
		toggle("edge")
	case 'p', 'P':
		if !d.parts["station"].since.IsZero() {
			toggle("station") // somebody killed it
			return
		}
		d.screen.print(d.stall())
	case 'l', 'L':
		d.screen.print(list(d.at)...)
	default:
		d.screen.print(keysHelp)
	}
}

// status is the line about everything.
func (d *demo) status() string {
	words := make([]string, 0, 8)
	for _, name := range partNames { // the cloud always, the others where there is something to say
		p := d.parts[name]
		switch {
		case p == nil: // the mapper, where it is a pod
		case !p.since.IsZero():
			words = append(words, fmt.Sprintf("%s DOWN %.0f s", name, time.Since(p.since).Seconds()))
		case p.stalled:
			words = append(words, name+" silent")
		case name == "cloud":
			words = append(words, "cloud up")
		}
	}
	return strings.Join(append(words, d.bus.words()...), " | ")
}

// logs is where a person looks next.
func (d *demo) logs() string { return d.shown(filepath.Join(d.dir, "log")) }
