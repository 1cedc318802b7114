declare
	have integer;
begin
	-- One migration runs at a time.
	perform pg_catalog.pg_advisory_xact_lock(@lock@);
	if not exists (select from pg_catalog.pg_namespace where nspname = @name@) then
		create schema @schema@;
	end if;
	if pg_catalog.to_regclass(@head@) is null then
		-- head says which version of pgstore has made the tables. Each change locks the row of
		-- head, and so the changes are made one after the other.
		create table @schema@.head (
			one boolean primary key default true check (one),
			version integer not null
		);
		insert into @schema@.head (version) values (0);
	end if;
	select version into strict have from @schema@.head;
	if have > @format@ then
		raise exception using errcode = 'KS003', message =
			'a later version of pgstore has made the tables of this schema';
	end if;

	if have < 1 then
		-- revision has the bits of an unsigned number. position is the position of the last write.
		create table @schema@.entry (
			key bytea primary key,
			value bytea not null,
			revision bigint not null,
			position bigint not null
		);
		-- Each row of log is one Apply. The positions have no holes. The tag tells one history from
		-- another that has the same positions. A deleted entry has a null value and revision 0, and
		-- deletes says that there is one. at is the time of the Apply, while the row of head is
		-- locked. oldest is the first position that the log has after the Apply. The row with the
		-- last position is never removed.
		create table @schema@.log (
			position bigint primary key,
			tag uuid not null default pg_catalog.gen_random_uuid(),
			at timestamptz not null default pg_catalog.clock_timestamp(),
			oldest bigint not null,
			keys bytea[] not null,
			vals bytea[] not null,
			revisions bigint[] not null,
			deletes boolean not null default false
		);
		-- To compress the rows would take more time than to write them.
		alter table @schema@.log alter keys set storage external, alter vals set storage external;
		create index log_deletes on @schema@.log (position) where deletes;
		insert into @schema@.log (position, oldest, keys, vals, revisions)
			values (1, 1, '{}', '{}', '{}');

		-- apply makes several calls of Apply, which are numbered from 1. No two of the calls write the
		-- same key, and none writes a key that another checks. apply returns the last row of the log.
		--
		-- Each change has a kind: check, delete or write. changes is the number of changes without
		-- those that check. If an entry does not have the revision that a change expects, apply fails
		-- with KS004, or with a unique violation, and changes nothing. The caller then calls apply
		-- again with changes null: apply looks at the entries first, and returns the numbers of the
		-- calls that conflict, or null. This would take half as long again for each call.
		--
		-- The role of the application may execute apply, and may not write to the tables.
		create function @schema@.apply(
			replicated boolean, restricts boolean, calls integer, changes integer,
			call integer[], kind text[], keys bytea[], vals bytea[], expects bigint[],
			revisions bigint[],
			out failed integer[], out at bigint, out tag uuid
		) language plpgsql security definer
		set search_path = pg_catalog, pg_temp
		set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off
		set jit = off -- what is off has a high cost, and PostgreSQL compiles a plan of high cost
		as @quote@
		declare
			last bigint;
			start bigint;
			made integer;
			more integer;
		begin
			if current_setting('synchronous_commit') = 'off'
				or replicated and current_setting('synchronous_commit') = 'local'
				or replicated and current_setting('synchronous_standby_names') = '' then
				raise exception using errcode = 'KS002', message =
					'commits do not wait for a disk and a standby';
			end if;
			-- The lock lasts until the commit is durable. So no other change is made between the
			-- lines below, and the positions become visible in their order.
			perform from @schema@.head for update;
			select array_agg(distinct c.call) into failed
				from unnest(call, kind, keys, expects) c(call, kind, key, expect)
				where (changes is null or c.kind = 'check') and c.expect <> coalesce(
					(select e.revision from @schema@.entry e where e.key = c.key), 0);
			if cardinality(failed) = calls then
				raise exception using errcode = 'KS001', message = 'conflict';
			elsif changes is not null and failed is not null then
				raise exception using errcode = 'KS004', message = 'some calls conflict';
			end if;
			select l.position, l.oldest into strict last, start
				from @schema@.log l order by l.position desc limit 1;
			-- The oldest @prune@ rows of the log go once the row that is @prune@ rows after the first
			-- remaining row is older than the span. A later transaction than that of the remaining
			-- row has added this row, so the remaining row was visible then. So for the whole span,
			-- each feed could read the remaining row, which follows those that go. A position that
			-- the log lacks counts as old. start bounds what is read, also while vacuum cannot free
			-- the rows that went.
			if last - start >= 2 * @prune@ and not exists (select from @schema@.log l
					where l.position = start + 2 * @prune@
					and l.at >= clock_timestamp() - interval '@span@') then
				delete from @schema@.log l
					where l.position >= start and l.position < start + @prune@;
				start := start + @prune@;
			end if;
			delete from @schema@.entry e
				using unnest(call, kind, keys, expects) c(call, kind, key, expect)
				where e.key = c.key and e.revision = c.expect and c.kind = 'delete'
				and (c.call = any(failed)) is not true;
			get diagnostics made = row_count;
			update @schema@.entry e
				set value = c.value, revision = c.revision, position = last + c.call -
					(select count(*) from unnest(failed) f(call) where f.call < c.call)
				from unnest(call, kind, keys, vals, expects, revisions)
					c(call, kind, key, value, expect, revision)
				where c.kind = 'write' and c.expect <> 0 and e.key = c.key and e.revision = c.expect
				and (c.call = any(failed)) is not true;
			get diagnostics more = row_count;
			made := made + more;
			insert into @schema@.entry (key, value, revision, position)
				select c.key, c.value, c.revision, last + c.call -
					(select count(*) from unnest(failed) f(call) where f.call < c.call)
				from unnest(call, kind, keys, vals, expects, revisions)
					c(call, kind, key, value, expect, revision)
				where c.kind = 'write' and c.expect = 0 and (c.call = any(failed)) is not true;
			get diagnostics more = row_count;
			if made + more <> changes then
				raise exception using errcode = 'KS004', message = 'some calls conflict';
			end if;
			insert into @schema@.log (position, oldest, keys, vals, revisions, deletes)
				select last + c.call -
						(select count(*) from unnest(failed) f(call) where f.call < c.call),
					start, array_agg(c.key), array_agg(c.value), array_agg(c.revision),
					bool_or(c.kind = 'delete')
				from unnest(call, kind, keys, vals, revisions) c(call, kind, key, value, revision)
				where c.kind <> 'check' and (c.call = any(failed)) is not true
				group by c.call;
			if restricts then
				perform pg_notify('@channel@', '');
			end if;
			select l.position, l.tag into strict at, tag
				from @schema@.log l order by l.position desc limit 1;
		end
		@quote@;

		-- page returns the first @page@ entries of a range, in ascending or in descending order. The
		-- settings make PostgreSQL read these entries only, by the index. If PostgreSQL believed that
		-- the range has few entries, it would read and sort the whole range, for each page.
		create function @schema@.page(low bytea, high bytea, down boolean)
			returns table (key bytea, value bytea, revision bigint, "position" bigint)
			language plpgsql stable rows @page@
		set search_path = pg_catalog, pg_temp
		set enable_seqscan = off set enable_bitmapscan = off set enable_sort = off set jit = off
		as @quote@
		begin
			-- No key has this many bytes.
			high := coalesce(high, decode(repeat('ff', 512), 'hex'));
			if down then
				return query select e.key, e.value, e.revision, e.position from @schema@.entry e
					where e.key >= low and e.key < high order by e.key desc limit @page@;
			else
				return query select e.key, e.value, e.revision, e.position from @schema@.entry e
					where e.key >= low and e.key < high order by e.key limit @page@;
			end if;
		end
		@quote@;
		revoke all on function @schema@.apply, @schema@.page from public;
		update @schema@.head set version = 1;
	end if;
end
